"""The classes of datasets that are recognised by them, in the order of the labels."""

__all__ = ["CLASS_LISTS", "DSRSID_CLASSES"]

_NAMES = {
    "ucmd": (
        "agricultural airplane baseballdiamond beach buildings chaparral denseresidential forest freeway golfcourse "
        "harbor intersection mediumresidential mobilehomepark overpass parkinglot river runway sparseresidential "
        "storagetanks tenniscourt"
    ),
    "aid": (
        "Airport BareLand BaseballField Beach Bridge Center Church Commercial DenseResidential Desert Farmland Forest "
        "Industrial Meadow MediumResidential Mountain Park Parking Playground Pond Port RailwayStation Resort River "
        "School SparseResidential Square Stadium StorageTanks Viaduct"
    ),
    "nwpu-resisc45": (
        "airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud "
        "commercial_area dense_residential desert forest freeway golf_course ground_track_field harbor "
        "industrial_area intersection island lake meadow medium_residential mobile_home_park mountain overpass palace "
        "parking_lot railway railway_station rectangular_farmland river roundabout runway sea_ice ship snowberg "
        "sparse_residential stadium storage_tank tennis_court terrace thermal_power_station wetland"
    ),
    "eurosat": (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    ),
}

CLASS_LISTS = {dataset: names.split() for dataset, names in _NAMES.items()}

# In the order of the columns of DSRSID's lists, which no document of the dataset states.
DSRSID_CLASSES = ("aquafarm", "cloud", "forest", "high building", "low building", "farm land", "river", "water")
