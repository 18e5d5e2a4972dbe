from lvssl.api import Encoding as Encoding
from lvssl.api import Model as Model
from lvssl.api import Neighbour as Neighbour
from lvssl.api import load as load
from lvssl.api import preset as preset
from lvssl.api import pretrain as pretrain

__version__: str
__all__: list[str]
