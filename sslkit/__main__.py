"""``python -m sslkit`` is the `sslkit` command; torchrun starts it so."""

from sslkit.commands.main import main

if __name__ == "__main__":
    main()
