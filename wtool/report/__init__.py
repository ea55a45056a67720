"""What was done to a checkpoint, for people to read.

figures   the manifest's report in figures: each quantized linear, and the stacks of blocks they stand in
heatmap   the error of every linear as a picture (SVG)
errors    the parts of the page on errors
asked     the parts on what was asked
style     how the page looks
html      the page
"""
