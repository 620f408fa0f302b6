"""How long a part takes on this machine, beside what it has to keep up with."""
