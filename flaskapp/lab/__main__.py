"""``python -m flaskapp.lab``: the race as `flask race` runs it, without making the application."""

from flaskapp.lab.race_command import make_race_cli

if __name__ == "__main__":
    make_race_cli()()
