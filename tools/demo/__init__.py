"""The demonstration: a market of agents on one machine, with everything in it real."""
