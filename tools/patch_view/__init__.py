"""How a text is cut into patches, for terminals, pictures, pages and tables: behind `blt-edge patches`."""
