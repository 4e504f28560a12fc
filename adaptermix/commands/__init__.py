"""Commands: from settings to calls, and recipes that chain them."""
