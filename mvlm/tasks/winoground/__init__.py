"""Winoground and data of its form: of two images and two captions, which belong together?"""
