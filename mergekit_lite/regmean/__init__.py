"""RegMean and RegMean++ on checkpoints: what was asked, what will happen, and the walk through the layers.

The arithmetic is in `mergekit_lite.methods.regmean`.
"""
