"""Where examples come from: one file per format, each a ``Source`` (see ``sayo_verl.data.rows``)."""
