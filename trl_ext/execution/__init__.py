"""How a batch runs through the model. The losses never see what happens here."""
