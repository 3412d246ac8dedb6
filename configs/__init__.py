"""What a user picks and edits: one file per experiment, every knob in `common.py`, a preset per dataset in `datasets.py`."""
