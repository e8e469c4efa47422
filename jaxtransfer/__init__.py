"""jaxtransfer: how much of a pretrained network does my task need?"""
