"""What was done to checkpoints, for people to read.

figures     the manifest's report in figures: each linear, and the stacks of blocks they stand in
measures    which of the figures are drawn, and in which words
scale       from a figure to a colour
heatmap     a figure of every linear as a picture (SVG)
layers      the parts of the page on layers: heatmaps, the worst ones, all of them
curves      the course of a training
sizes       bytes, parameters, and what a pruning kept
quality     what `wtool eval --json` measured
asked       what was asked, and how to have it again
comparison  several checkpoints side by side
style       how the page looks
html        the page
plots       the pictures alone, as PNG
"""
