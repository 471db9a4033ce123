"""How good a judge is: asked about labelled comparisons and attacked, outside of a campaign."""
