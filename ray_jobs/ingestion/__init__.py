"""What ingestion makes: parts of pairs, the search for duplicates among them, the manifest."""
