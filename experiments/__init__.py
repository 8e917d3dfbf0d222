"""The experiments: each runs `subsetopt` on real data and writes its numbers as JSON."""
