"""The backward family: one weighted recursion, and the laws that choose its weights."""
