"""A package, because some distributions install one of this name, which would hide a directory."""
