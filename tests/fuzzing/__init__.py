"""What `tests/fuzz.py` is made of: small real files, ways to damage them, and who reads them."""
