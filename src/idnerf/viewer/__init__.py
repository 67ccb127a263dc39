"""The web viewer: a picture that follows the browser's camera.

browser camera --world_frame--> ViewPoint --RenderQueue--> Job --SceneRenderer--> Picture --display--> browser
                                            latest camera wins    encodes sources
                                            coarse, then full     once per set
"""
