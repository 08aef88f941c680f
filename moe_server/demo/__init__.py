"""The embedded demo checkpoint: a tiny Mixtral that is read as files; see README.md here."""
