"""Where an output comes from: the manifest, and hashes of the data rows it was made with."""
