"""Everything that opens model files, and the atomic writes that all files of a run go through."""
