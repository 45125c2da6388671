from fastvq.reference import ema_update_ as ema_update_
