"""`python -m peft_isolate.cli`."""

from . import main

if __name__ == "__main__":
    main()
