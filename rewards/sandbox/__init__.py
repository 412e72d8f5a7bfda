"""A jail for programs that nobody vouches for, on Linux, without privileges."""
