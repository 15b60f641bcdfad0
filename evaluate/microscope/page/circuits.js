// Circuits: the attribution graph of a prompt through the run's transcoders.
import { heading, note } from "./parts/controls.js";

export function showCircuits(place) {
  place.append(heading("Circuits"), note("Not there yet."));
}
