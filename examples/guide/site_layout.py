"""A hook of mkdocs: the guide's pages stand at the site's root, so that index.md is its home."""


def on_files(files, config):
    """Move every page of guide/ one folder up; links follow by themselves."""
    for file in files:
        if file.src_uri.startswith("guide/"):
            file.dest_uri = file.dest_uri.removeprefix("guide/")
    return files
