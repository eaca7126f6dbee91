"""The methods of the family, one file each; installed as `lorafamily.variants` and found by entry points."""
