"""Programs run by hand for as long as one likes: random sequences, kills and long runs, each against an oracle."""
