"""Ask whether a real language model thinks on a built two-hop task on real facts."""
