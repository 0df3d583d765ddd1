"""Steps, and the whole engine under load, beside what a user would run instead."""
