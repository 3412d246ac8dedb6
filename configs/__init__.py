"""What a user picks and edits.

One file per experiment, every knob in `common.py`, a preset per dataset in `datasets.py`.
"""
