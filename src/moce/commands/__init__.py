"""One file per verb: settings in, a folder and a small result out. The CLI and moce.VERB call these."""
