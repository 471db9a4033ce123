"""The stages of a round, one file each; every one works on a round folder and can run alone."""
