"""A demo of cross-lingual transfer with a small hand-written corpus."""
