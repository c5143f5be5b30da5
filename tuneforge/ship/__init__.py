"""A model goes to work: export, the store of champions, the server, its test over the wire, and tuning again."""
