"""Whether a run can be trusted with money: storms of crashes, faults, hostile input and load against a real server."""
