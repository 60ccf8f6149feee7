"""Several servers of one model behind one gateway, with one data directory."""
