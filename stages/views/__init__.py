"""Pictures and numbers for people. They are drawn from finished artifacts, and no key or digest depends on them."""
