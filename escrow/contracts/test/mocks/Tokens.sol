// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice A plain token with a mint; the others bend it.
contract PlainToken {
    uint256 public totalSupply;
    mapping(address => uint256) public balanceOf;
    mapping(address => mapping(address => uint256)) public allowance;

    event Transfer(address indexed from, address indexed to, uint256 value);

    function mint(address to, uint256 amount) external {
        totalSupply += amount;
        balanceOf[to] += amount;
    }

    function approve(address spender, uint256 amount) external returns (bool) {
        allowance[msg.sender][spender] = amount;
        return true;
    }

    function transfer(address to, uint256 amount) external virtual returns (bool) {
        return _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external virtual returns (bool) {
        if (allowance[from][msg.sender] != type(uint256).max) allowance[from][msg.sender] -= amount;
        return _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) internal virtual returns (bool) {
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
        emit Transfer(from, to, amount);
        return true;
    }
}

/// @notice Keeps one unit of whatever passes.
contract FeeToken is PlainToken {
    function _move(address from, address to, uint256 amount) internal override returns (bool) {
        super._move(from, to, amount);
        balanceOf[to] -= 1;
        totalSupply -= 1;
        return true;
    }
}

/// @notice Says nothing, as some old tokens do.
contract SilentToken is PlainToken {
    function transfer(address to, uint256 amount) external override returns (bool) {
        _move(msg.sender, to, amount);
        assembly ("memory-safe") {
            return(0, 0)
        }
    }

    function transferFrom(address from, address to, uint256 amount) external override returns (bool) {
        _move(from, to, amount);
        assembly ("memory-safe") {
            return(0, 0)
        }
    }
}

/// @notice Says yes and moves nothing, when told to.
contract LyingToken is PlainToken {
    bool public lies;

    function lie(bool on) external {
        lies = on;
    }

    function _move(address from, address to, uint256 amount) internal override returns (bool) {
        return lies || super._move(from, to, amount);
    }
}

/// @notice Refuses some receivers, by revert, by `false`, by burning all gas or with a long answer;
/// and calls back into whoever sent it, when told to.
contract MoodyToken is PlainToken {
    enum Mood {
        Fine,
        Reverts,
        ReturnsFalse,
        BurnsGas,
        LongAnswer
    }

    mapping(address => Mood) public moodFor;
    address public target;
    bytes public payload;
    bool public reentered;

    function setMood(address to, Mood mood) external {
        moodFor[to] = mood;
    }

    /// @notice Every later move first sends `payload_` to `target_`.
    function attack(address target_, bytes calldata payload_) external {
        (target, payload) = (target_, payload_);
    }

    function _move(address from, address to, uint256 amount) internal override returns (bool) {
        if (target != address(0)) {
            (bool done,) = target.call(payload);
            if (done) reentered = true;
        }
        Mood mood = moodFor[to];
        if (mood == Mood.Reverts) revert("receiver refused");
        if (mood == Mood.ReturnsFalse) return false;
        if (mood == Mood.BurnsGas) {
            assembly ("memory-safe") {
                invalid()
            }
        }
        if (mood == Mood.LongAnswer) {
            assembly ("memory-safe") {
                revert(0, 1000000)
            }
        }
        return super._move(from, to, amount);
    }
}
