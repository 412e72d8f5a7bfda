"""`python -m grpo`, which is how `accelerate launch` starts it."""

from grpo.cli import main

if __name__ == "__main__":
    main()
