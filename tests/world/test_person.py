"""People: sampled by seed, and siblings that differ in exactly the requested values."""

import pytest
import torch

from openpulid.world import FACIAL, HELD_OUT_PEOPLE, PARAMETERS, SKIN, Person
from openpulid.world.dataset import Plan


def test_person_depends_on_seed_only():
    assert Person.from_seed(7) == Person.from_seed(7)
    assert Person.from_seed(7) != Person.from_seed(8)
    assert Person.from_seed(0).face_width == pytest.approx(0.4962566, abs=1e-6)
    assert all(0 <= value <= 1 for value in Person.from_seed(3).vector())


def test_vector_round_trip():
    person = Person.from_seed(5)
    assert Person.from_vector(person.vector()) == person
    with pytest.raises(ValueError):
        Person.from_vector([0.5])


@pytest.mark.parametrize("changes", [1, 4, 16])
def test_siblings_differ_in_given_number_of_values(changes):
    generator = torch.Generator().manual_seed(changes)
    person = Person.from_seed(11)
    sibling = person.sibling(generator, changes)
    changed = [name for name in PARAMETERS if getattr(person, name) != getattr(sibling, name)]
    assert len(changed) == changes
    assert set(changed) <= set(FACIAL)
    assert all(abs(getattr(person, name) - getattr(sibling, name)) >= 0.4 for name in changed)


def test_held_out_people_are_new_and_families_share_skin():
    train, held_out = Plan(people=8), Plan(people=8, held_out=True)
    assert held_out.person(0) == Person.from_seed(HELD_OUT_PEOPLE)
    assert not {train.person(i) for i in range(8)} & {held_out.person(i) for i in range(8)}
    first, second = held_out.person(0), held_out.person(1)
    assert all(getattr(first, name) == getattr(second, name) for name in SKIN)
    assert sum(getattr(first, name) != getattr(second, name) for name in FACIAL) == len(FACIAL)


def test_portraits_show_unrelated_people_in_one_setting():
    plan = Plan(people=8, scenes=2, seed=3, portraits=True)
    family_people = {Plan(people=8).person(i) for i in range(8)} | {
        Plan(people=8, held_out=True).person(i) for i in range(8)
    }
    people = [plan.person(i) for i in range(8)]
    assert len(set(people)) == 8 and not family_people & set(people)
    assert not any(getattr(people[0], name) == getattr(people[1], name) for name in FACIAL)
    scenes = [plan.scene(i, k) for i in range(8) for k in range(2)]
    assert {(s.pose, s.light, s.hat, s.glasses, s.style) for s in scenes} == {
        ("front", "studio", "none", "none", "photo")
    }
    assert len({s.background for s in scenes}) > 3 and len({s.expression for s in scenes}) > 2
    assert not any(s.is_held_out for s in scenes)
