"""Pictures and numbers for people, drawn from finished artifacts. In no key and in no digest."""
