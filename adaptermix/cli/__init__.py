"""adaptermix command line."""
