"""A small render-only model: the same bodies, joints, sites and cameras with coarser meshes and textures.

Nothing here touches physics: the model is driven by joint positions and only drawn. A scene of 300,000 faces and
270 MB becomes one of 25,000 faces and 10 MB, which software GL draws in a few milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

# Groups that LIBERO's renderer shows: 0 holds the collision geoms.
VISIBLE_GROUPS = (1, 2)
# Meshes up to this many faces are kept as they are; large flat faces do not survive clustering.
_SMALL_MESH = 256
# Textures are reduced to at most this many pixels per side (per cube face).
_TEXTURE_SIZE = 256
# Texture coordinates are averaged within bins of 1/8, so that a cell on a seam does not mix two parts of the picture.
_TEXTURE_BINS = 8


@dataclass(frozen=True)
class Mesh:
    """Triangles with normals per vertex and, where textured, texture coordinates per corner.

    Attributes:
        positions: float [V, 3], in the body's frame (m).
        normals: float [N, 3], unit length.
        faces, face_normals: int [F, 3], into `positions` and `normals`.
        coordinates: float [T, 2] or None.
        face_coordinates: int [F, 3], into `coordinates`, or None.
    """

    positions: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    face_normals: np.ndarray
    coordinates: np.ndarray | None = None
    face_coordinates: np.ndarray | None = None


def simplified_model(full: mujoco.MjModel, cells: int) -> mujoco.MjModel:
    """A render-only model whose meshes are clustered on a grid of `cells` cells along their longest side.

    Bodies, joints, sites, cameras and lights keep their indices and names; geoms, meshes and materials do not.
    Untextured meshes of one body and one colour are drawn as one.
    """
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_FALSE
    _copy_view(full, spec)
    bodies = _copy_bodies(full, spec)
    _copy_appearance(full, spec)
    visible = np.flatnonzero(np.isin(full.geom_group, VISIBLE_GROUPS) & (full.geom_rgba[:, 3] > 0))
    is_mesh = full.geom_type[visible] == mujoco.mjtGeom.mjGEOM_MESH
    for geom in visible[~is_mesh]:
        bodies[full.geom_bodyid[geom]].add_geom(
            type=mujoco.mjtGeom(full.geom_type[geom]),
            size=full.geom_size[geom],
            pos=full.geom_pos[geom],
            quat=full.geom_quat[geom],
            **_looks(full, geom),
        )
    for geoms in _drawn_together(full, visible[is_mesh]):
        mesh = _merged(full, geoms)
        if len(mesh.faces) > _SMALL_MESH:
            mesh = cluster(mesh, cells)
        name = f"mesh_{geoms[0]}"
        _add_mesh(spec, name, mesh)
        bodies[full.geom_bodyid[geoms[0]]].add_geom(
            type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name, **_looks(full, geoms[0])
        )
    return spec.compile()


def cluster(mesh: Mesh, cells: int) -> Mesh:
    """Vertex clustering (Rossignac and Borrel 1993): all vertices in a grid cell become their mean.

    Of the faces that fall together the largest is kept. Normals are averaged per cell and main direction and texture
    coordinates per cell and texture bin, so that the two sides of a thin wall and the two sides of a seam stay apart.
    """
    low = mesh.positions.min(0)
    side = (mesh.positions.max(0) - low).max() / cells
    grid = np.minimum(((mesh.positions - low) / side).astype(np.int64), cells - 1)
    _, cell = np.unique(grid @ np.array([1, cells, cells * cells]), return_inverse=True)
    corners = cell[mesh.faces]
    kept = _surviving_faces(mesh, corners)

    normals = mesh.normals[mesh.face_normals].reshape(-1, 3)
    axis = np.abs(normals).argmax(1)
    negative = np.take_along_axis(normals, axis[:, None], 1)[:, 0] < 0
    direction, face_normals = _averages(corners, 2 * axis + negative, 6, normals, kept)
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    coordinates = face_coordinates = None
    if mesh.coordinates is not None and mesh.face_coordinates is not None:
        values = mesh.coordinates[mesh.face_coordinates].reshape(-1, 2)
        bins = np.floor(values * _TEXTURE_BINS).astype(np.int64) % 64  # textures that repeat more often may mix
        coordinates, face_coordinates = _averages(corners, bins @ np.array([64, 1]), 4096, values, kept)
    return Mesh(
        positions=_means(cell, mesh.positions),
        normals=direction / np.maximum(length, 1e-9),
        faces=corners[kept],
        face_normals=face_normals,
        coordinates=coordinates,
        face_coordinates=face_coordinates,
    )


def _surviving_faces(mesh: Mesh, corners: np.ndarray) -> np.ndarray:
    """Indices of the faces that keep three distinct corners, one per oriented triple of cells."""
    a, b, c = corners.T
    alive = np.flatnonzero((a != b) & (b != c) & (a != c))
    p, q, r = (mesh.positions[mesh.faces[alive, corner]] for corner in range(3))
    alive = alive[np.argsort(-np.linalg.norm(np.cross(q - p, r - p), axis=1), kind="stable")]
    first = corners[alive].argmin(1)
    oriented = np.take_along_axis(corners[alive], (first[:, None] + np.arange(3)) % 3, 1)
    _, largest = np.unique(oriented, axis=0, return_index=True)
    return np.sort(alive[largest])


def _averages(
    corners: np.ndarray, bins: np.ndarray, count: int, values: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means of `values` [3 F, n] per cell and bin, and the kept faces' indices [K, 3] into them."""
    _, group = np.unique(corners.reshape(-1) * count + bins, return_inverse=True)
    means = _means(group, values)
    used, indices = np.unique(group.reshape(-1, 3)[kept], return_inverse=True)
    return means[used], indices.reshape(-1, 3)


def _means(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    sums = np.stack([np.bincount(group, column) for column in values.T], axis=1)
    return sums / np.bincount(group)[:, None]


def _drawn_together(full: mujoco.MjModel, geoms: np.ndarray) -> list[list[int]]:
    """Mesh geoms grouped into one draw call each: same body, same plain colour; a textured one stays alone."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for geom in map(int, geoms):
        material, body = full.geom_matid[geom], int(full.geom_bodyid[geom])
        if material < 0:
            key = (body, *full.geom_rgba[geom].round(2))
        elif (full.mat_texid[material] >= 0).any():
            key = (body, "textured", geom)
        else:
            surface = (full.mat_emission, full.mat_specular, full.mat_shininess, full.mat_reflectance)
            key = (body, "material", *full.mat_rgba[material].round(2), *(value[material] for value in surface))
        groups.setdefault(key, []).append(geom)
    return list(groups.values())


def _merged(full: mujoco.MjModel, geoms: list[int]) -> Mesh:
    """The meshes of some geoms of one body as one, in the body's frame."""
    positions, normals, faces, face_normals = [], [], [], []
    vertex_count = normal_count = 0
    for geom in geoms:
        mesh = full.mesh(full.geom_dataid[geom]).id
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, full.geom_quat[geom])
        rotation = rotation.reshape(3, 3)
        triangles = _part(full.mesh_faceadr, full.mesh_facenum, mesh)
        positions.append(
            full.mesh_vert[_part(full.mesh_vertadr, full.mesh_vertnum, mesh)] @ rotation.T + full.geom_pos[geom]
        )
        normals.append(full.mesh_normal[_part(full.mesh_normaladr, full.mesh_normalnum, mesh)] @ rotation.T)
        faces.append(full.mesh_face[triangles] + vertex_count)
        face_normals.append(full.mesh_facenormal[triangles] + normal_count)
        vertex_count += len(positions[-1])
        normal_count += len(normals[-1])
    material, mesh = full.geom_matid[geoms[0]], full.geom_dataid[geoms[0]]
    coordinates = face_coordinates = None
    if material >= 0 and (full.mat_texid[material] >= 0).any() and full.mesh_texcoordnum[mesh] > 0:
        coordinates = full.mesh_texcoord[_part(full.mesh_texcoordadr, full.mesh_texcoordnum, mesh)]
        face_coordinates = full.mesh_facetexcoord[_part(full.mesh_faceadr, full.mesh_facenum, mesh)]
    return Mesh(
        np.concatenate(positions),
        np.concatenate(normals),
        np.concatenate(faces),
        np.concatenate(face_normals),
        coordinates,
        face_coordinates,
    )


def _part(addresses: np.ndarray, counts: np.ndarray, index: int) -> slice:
    return slice(addresses[index], addresses[index] + counts[index])


def _add_mesh(spec: mujoco.MjSpec, name: str, mesh: Mesh) -> None:
    # MjSpec takes one normal per vertex, so a vertex is a pair of position and normal.
    pairs = np.stack([mesh.faces.reshape(-1), mesh.face_normals.reshape(-1)], axis=1)
    vertices, faces = np.unique(pairs, axis=0, return_inverse=True)
    added = spec.add_mesh(name=name, inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL)
    added.uservert = mesh.positions[vertices[:, 0]].ravel()
    added.usernormal = mesh.normals[vertices[:, 1]].ravel()
    added.userface = faces.ravel()
    if mesh.coordinates is not None and mesh.face_coordinates is not None:
        added.usertexcoord = mesh.coordinates.ravel()
        added.userfacetexcoord = mesh.face_coordinates.ravel()


def _looks(full: mujoco.MjModel, geom: int) -> dict[str, object]:
    looks: dict[str, object] = {"rgba": full.geom_rgba[geom], "group": VISIBLE_GROUPS[0]}
    looks |= {"contype": 0, "conaffinity": 0}
    if full.geom_matid[geom] >= 0:
        looks["material"] = f"material_{full.geom_matid[geom]}"
    return looks


def _copy_view(full: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
    spec.visual.map.znear, spec.visual.map.zfar = full.vis.map.znear, full.vis.map.zfar
    spec.stat.extent, spec.stat.center = full.stat.extent, full.stat.center
    spec.visual.quality.shadowsize = 0  # no light of LIBERO casts a shadow
    headlight = full.vis.headlight
    for name in ("ambient", "diffuse", "specular", "active"):
        setattr(spec.visual.headlight, name, getattr(headlight, name))


def _copy_bodies(full: mujoco.MjModel, spec: mujoco.MjSpec) -> list[mujoco.MjsBody]:
    bodies = [spec.worldbody]
    for index in range(1, full.nbody):
        body = bodies[full.body_parentid[index]].add_body(
            name=full.body(index).name, pos=full.body_pos[index], quat=full.body_quat[index]
        )
        body.explicitinertial, body.mass, body.inertia = True, 1.0, (1.0, 1.0, 1.0)  # never simulated
        bodies.append(body)
    for joint in range(full.njnt):
        hinge = full.jnt_type[joint] in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)
        bodies[full.jnt_bodyid[joint]].add_joint(
            name=full.joint(joint).name,
            type=mujoco.mjtJoint(full.jnt_type[joint]),
            pos=full.jnt_pos[joint],
            axis=full.jnt_axis[joint],
            ref=full.qpos0[full.jnt_qposadr[joint]] if hinge else 0.0,
        )
    for site in range(full.nsite):
        bodies[full.site_bodyid[site]].add_site(
            name=full.site(site).name,
            type=mujoco.mjtGeom(full.site_type[site]),
            size=full.site_size[site],
            pos=full.site_pos[site],
            quat=full.site_quat[site],
            rgba=full.site_rgba[site],
            group=full.site_group[site],
        )
    for camera in range(full.ncam):
        bodies[full.cam_bodyid[camera]].add_camera(
            name=full.cam(camera).name,
            pos=full.cam_pos[camera],
            quat=full.cam_quat[camera],
            fovy=full.cam_fovy[camera],
        )
    for light in range(full.nlight):
        added = bodies[full.light_bodyid[light]].add_light(directional=bool(full.light_directional[light]))
        for name in ("pos", "dir", "ambient", "diffuse", "specular", "attenuation", "cutoff", "exponent"):
            setattr(added, name, getattr(full, f"light_{name}")[light])
        added.castshadow, added.active = 0, full.light_active[light]
    return bodies


def _copy_appearance(full: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
    """Materials and textures of visible geoms, and the sky."""
    visible = np.isin(full.geom_group, VISIBLE_GROUPS)
    materials = sorted({int(material) for material in full.geom_matid[visible] if material >= 0})
    textures = {int(texture) for material in materials for texture in full.mat_texid[material] if texture >= 0}
    textures |= set(map(int, np.flatnonzero(full.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)))
    for texture in sorted(textures):
        pixels = _reduced_texture(full, texture)
        added = spec.add_texture(name=f"texture_{texture}", type=mujoco.mjtTexture(full.tex_type[texture]))
        added.height, added.width, added.nchannel = pixels.shape
        added.data = pixels.tobytes()
    for material in materials:
        added = spec.add_material(name=f"material_{material}", texuniform=bool(full.mat_texuniform[material]))
        for name in ("emission", "specular", "shininess", "reflectance", "rgba", "texrepeat"):
            setattr(added, name, getattr(full, f"mat_{name}")[material])
        for role, texture in enumerate(full.mat_texid[material]):
            if texture >= 0:
                added.textures[role] = f"texture_{texture}"


def _reduced_texture(full: mujoco.MjModel, texture: int) -> np.ndarray:
    """A texture averaged over square blocks, uint8 [height, width, channels]; cube faces lie one below another."""
    height, width, channels = (int(size[texture]) for size in (full.tex_height, full.tex_width, full.tex_nchannel))
    start = full.tex_adr[texture]
    pixels = full.tex_data[start : start + height * width * channels]
    is_cube = full.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D
    faces, face_height = (height // width, width) if is_cube else (1, height)
    block = -(-max(face_height, width) // _TEXTURE_SIZE)
    rows, columns = face_height // block, width // block
    pixels = pixels.reshape(faces, face_height, width, channels)[:, : rows * block, : columns * block]
    blocks = pixels.reshape(faces, rows, block, columns, block, channels)
    return blocks.mean((2, 4)).round().astype(np.uint8).reshape(faces * rows, columns, channels)
