"""A share of the traffic on another version: split, observe, judge, step or go back."""
