"""Services of any long-running program: atomic files, random state, processes, memory, argument checks."""
