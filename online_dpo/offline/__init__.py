"""Preference training on a file of pairs, without a campaign."""
