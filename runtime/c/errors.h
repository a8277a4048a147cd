// What goes wrong, as the C API reports it.
#pragma once
#include <stdexcept>
#include <string>

#include "wasat.h"

namespace wasat {

inline const std::string AGAIN = "compile the model again";

struct Error : std::runtime_error {
  wasat_status code;
  Error(wasat_status code, const std::string &message) : std::runtime_error(message), code(code) {}
};

[[noreturn]] inline void damaged(const std::string &what) {
  bool goes_on = what.size() > 2 && !what.compare(what.size() - 3, 3, " or");  // "copy it again, or"
  throw Error(WASAT_ARTIFACT, what + (goes_on ? " " : "; ") + AGAIN);
}

}  // namespace wasat
