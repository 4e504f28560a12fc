"""The provenance of an output: its manifest, and hashes of the data rows that it was made with."""
