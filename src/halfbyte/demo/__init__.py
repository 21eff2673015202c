"""The demo's recipe and its rows, as data of the package: what ``halfbyte demo`` trains."""
