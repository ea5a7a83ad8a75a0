"""A folder's name with every character that a shell, an address, a pattern or a template takes for its own."""

ODD_NAME = "a ?b#c%41&d;e'f\"g[h]{i}$HOME=j!k*l\\m`n`|<o>~ä😀@p:q,r"
